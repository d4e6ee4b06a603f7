"""What a network is trained to do with labels: a file for each task; knows no schedule, processes or files."""
