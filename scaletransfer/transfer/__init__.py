"""From a pre-trained network to a fine-tuned one: rules, selections, data, network, and the run put together."""
