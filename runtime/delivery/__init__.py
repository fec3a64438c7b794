"""How a bundle reaches a device and stays or goes: updates, slots, activation, the fleet's view."""
