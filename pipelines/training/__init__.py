"""A training run: what its workers are, its folder, its run in MLflow. Imports nothing here on purpose."""
