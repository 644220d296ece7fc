"""The embedded offline default: a small RACE-format corpus of our own and a tiny ALBERT with random weights."""

# learning rates in the ratio 1 : 1 : 0.1 of the real recipe; about 60 s of training on two CPU cores
STAGES = {
    "ex01": {"LEARNING_RATE": 2.5e-4, "MAX_EPOCHS": 1},
    "ex02": {"LEARNING_RATE": 2.5e-4, "MAX_EPOCHS": 2},
    "ex03": {"LEARNING_RATE": 2.5e-5, "MAX_EPOCHS": 2},
}
