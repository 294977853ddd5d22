"""Many hosts on one machine, for tests and for trying out (`make fleet HOSTS=8`)."""
