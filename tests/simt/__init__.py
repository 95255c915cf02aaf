"""The kernel language: emulator, traps, races, mutants."""
