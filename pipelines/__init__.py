"""The stages: a stage is a verb. Imports nothing here on purpose."""
