"""Whether what comes in and what goes out still look as they did at export: pure measures."""
