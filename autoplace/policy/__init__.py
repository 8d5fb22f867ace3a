"""The learned policy: features of a decision, the network that scores devices, and placements by it."""
