"""The Parquet dataset. Imports nothing here on purpose."""
