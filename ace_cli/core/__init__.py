"""What everything stands on: errors, the registry of choices, devices, memory, timing."""
