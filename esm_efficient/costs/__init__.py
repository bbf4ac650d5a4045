"""What memory and time are counted in. `devices` loads no torch, so nothing is imported here."""
