"""The alignment: contract, errors, lowering, sharding, tuning."""
