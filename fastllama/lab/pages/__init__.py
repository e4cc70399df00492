"""What people read: tables, an HTML page, TensorBoard."""
