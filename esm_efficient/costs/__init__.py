"""What memory and time are counted in. This file imports nothing, because `costs.devices` must not load torch."""
