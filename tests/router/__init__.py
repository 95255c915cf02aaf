"""The router, alone and with the alignment: contract, transforms, errors."""
