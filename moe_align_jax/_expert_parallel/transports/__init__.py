"""The transports that carry rows between devices."""
