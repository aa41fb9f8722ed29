"""What a worker of a training run is. Imports nothing here on purpose."""
