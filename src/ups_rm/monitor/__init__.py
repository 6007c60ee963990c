"""Whether a training is cheating its reward model: named alarms over the metrics of its steps and validations.

`limits` holds them, `watch` shows and writes them, `judge` is the second reward model. Nothing here changes what is
trained.
"""
