"""This process: what it was given, how far it is, how it is stopped. Imports nothing here on purpose."""
