"""The commands of `flexinfer`, one file a command; flexinfer.cli puts them together."""
