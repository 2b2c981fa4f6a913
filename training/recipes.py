"""Published training settings, as far as there are flags for them.

`model` is the architecture that a recipe is for, if there is only one.
"""

RECIPES = {
    # Papyan, Han & Donoho (PNAS 2020): the best of the 25 learning rates that they tried, for cross-entropy
    "papyan": {
        "optimizer": "SGD",
        "optimizer_options": {"momentum": 0.9, "weight_decay": 5e-4},
        "learning_rate": 0.0679,
        "batch_size": 128,
        "schedule": "steps",
        "epochs": 350,
        "measure": "log",
    },
    # Oikarinen (github tuomaso/train_mnist_fast)
    "oikarinen": {
        "model": "MNISTNet",
        "optimizer": "Adam",
        "optimizer_options": {"betas": [0.7, 0.9]},
        "learning_rate": 0.01,
        "batch_size": 256,
        "schedule": "one-cycle",
        "epochs": 1,
    },
    # Shwartz-Ziv & Tishby (github ravidziv/IDNNs), but with different initial weights
    "shwartz-ziv": {
        "model": "MLP",
        "nonlinearity": "Tanh",
        "optimizer": "Adam",
        "learning_rate": 4e-4,
        "batch_size": 512,
        "epochs": 8000,
        "measure": "log",
    },
}
