"""The storm: sandboxes come and go while everything that can die is killed. `make storm SEED=n KILLS=n`."""
