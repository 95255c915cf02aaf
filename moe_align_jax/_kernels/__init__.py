"""The GPU kernels, written in the language of `_simt`: one folder per op, one file per form."""
