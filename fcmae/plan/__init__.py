"""What a pretraining would take on machines that need not be there: time, memory, traffic, cost; trains nothing."""
