"""How a primitive of ours is made, and which implementation it is lowered to."""
