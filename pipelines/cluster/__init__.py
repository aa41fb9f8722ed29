"""The Ray that a stage runs on. Imports nothing here on purpose."""
