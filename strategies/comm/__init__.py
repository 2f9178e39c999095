"""Process groups: formed together, left together, and how their ranks find one another."""
