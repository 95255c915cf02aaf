"""What every system uses and that knows no system: checks of arguments, files."""
