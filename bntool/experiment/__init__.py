"""The same network trained with and without BatchNorm: settings, data, training, what is watched, plots."""
