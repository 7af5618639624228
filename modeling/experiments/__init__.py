"""From settings to a trained and measured run."""
