"""What a picture shows: GenEval's rule, detectors and colours, CLIP features, vision-language models."""
