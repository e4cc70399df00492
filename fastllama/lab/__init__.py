"""The laboratory: what is asked, how it is measured and compared, and the records that are kept."""
