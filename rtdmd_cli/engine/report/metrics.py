"""What the names of a metric line mean: one sentence for each, for reports, the viewer and `rtdmd runs show`. No torch."""

METRICS = {
    "fake_loss": "Error of the fake score, the network that learns the generator's own pictures, in the velocity it "
    "predicts; it settles, but does not reach zero, because the noise in its target cannot be predicted.",
    "dmd_loss": "Loss of distribution matching: how far teacher and fake score disagree about the generator's pictures, "
    "over a normaliser of the same size.",
    "gap": "Mean absolute difference between the clean pictures that teacher and fake score predict from the same noisy "
    "points, before the normaliser: how far the generator still is from the teacher.",
    "consistency_loss": "Whether the fake score predicts the same clean picture from two points of one path; an unbiased "
    "estimate of a square, so that single values may be negative.",
    "fake_grad_norm": "Length of the fake score's gradient before clipping; a lasting rise announces trouble.",
    "generator_grad_norm": "Length of the generator's gradient before clipping; a lasting rise announces trouble.",
    "lag": "Distance of the fake score's clean prediction from the generator's own pictures at fixed points, root mean "
    "square over latents: how far the fake score is behind the generator.",
    "lag_teacher": "The same distance of the teacher's prediction, to compare `lag` with.",
    "previews/strict_score": "Share of held-out captions that a picture of each shows, by GenEval's strict rule; never "
    "trained on.",
    "previews/clip_score": "Mean cosine of the grid's pictures with their prompts, by a CLIP that is not trained on.",
    "previews/teacher_distance": "Mean cosine distance of CLIP features between the generator's pictures and the "
    "teacher's of the same prompt and noise.",
    "hinge_loss": "How far the differentiable rewards of the pictures below the margin still are from it.",
    "hinge_active": "Share of the back-propagated pictures whose reward lies below the margin.",
    "tilt_effective": "Effective share of the epoch's pictures to which the tilt fits the fake score: near 1 it hardly "
    "leans to the rewards, near 0 a few poor pictures decide.",
    "drift": "Difference of a transition's log-probability between rollout and update, with the same weights: anything "
    "but a tiny value is a fault.",
    "kl": "Divergence of the generator's transitions from those of stage 1's generator.",
    "left_out": "Pictures of an epoch that a reward could not judge and that are left out of training.",
    "watch/held_out": "Mean change of the held-out rewards since the start, in standard deviations of the start's pictures.",
    "watch/diversity": "Mean cosine distance between the pictures of a prompt; a lasting fall means that they become alike.",
    "watch/frechet": "Squared Fréchet distance of picture features to the teacher's; comparable within a run only.",
    "seconds": "Training time so far, seconds.",
    "iterations_per_second": "Speed of the newest iteration, or epoch, per second.",
    "learning_rate/generator": "Learning rate of the generator's newest step.",
    "learning_rate/fake": "Learning rate of the fake score's newest step.",
    "memory_gib": "Most GPU memory that this process has held so far, GiB.",
}
"""Metric name -> one sentence."""
FAMILIES = {
    "reward/": "Mean of this reward over the epoch's training pictures; it can be exploited.",
    "measured/": "Mean of this reward over fixed prompts and seeds.",
}
"""Beginning of a metric name -> one sentence."""


def explained(name: str) -> str:
    """One sentence on a metric; "" for a name that is not known."""
    if name in METRICS:
        return METRICS[name]
    return next((text for start, text in FAMILIES.items() if name.startswith(start)), "")
