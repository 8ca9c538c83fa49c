"""CRA-SRGAN, the network of this project."""
