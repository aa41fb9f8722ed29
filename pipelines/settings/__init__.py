"""What can be set: config files, the command line, each setting. Imports nothing here on purpose."""
