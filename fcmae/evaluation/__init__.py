"""What a trained network is worth: probes of frozen features, predictions and reconstructions; trains none."""
