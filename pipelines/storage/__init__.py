"""Files on this machine or in a bucket. Imports nothing here on purpose."""
