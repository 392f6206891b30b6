"""The decoder: weights, one forward pass, and the values it works on."""
