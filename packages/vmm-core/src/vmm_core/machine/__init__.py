"""Machine models: what every machine has (`core`), and the machines themselves (`microvm`)."""
