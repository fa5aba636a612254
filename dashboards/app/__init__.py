"""The app: the report's figures over a results folder that is still being written."""
