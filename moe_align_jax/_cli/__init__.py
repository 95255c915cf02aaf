"""The commands of `moe-align`, one module each. Only they and `cli` import typer and rich."""
