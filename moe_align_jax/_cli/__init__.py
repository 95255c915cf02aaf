"""The commands of `moe-align`, one module each; they import typer and rich, the rest of the package never."""
