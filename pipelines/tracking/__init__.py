"""What MLflow keeps: runs, figures, versions; a checkpoint by its name. Imports nothing here on purpose."""
