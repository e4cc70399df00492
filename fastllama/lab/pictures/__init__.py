"""Pictures of records and sweeps."""
