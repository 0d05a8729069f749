"""What a lab run is: devices, speeds, partition, faults, and when it ends."""
