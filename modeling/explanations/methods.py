"""The names of the methods; apart, so that a command line needs nothing else to show them."""

GRAD_CAM, ATTENTION, INTEGRATED_GRADIENTS, OCCLUSION = "grad-cam", "attention", "integrated-gradients", "occlusion"
# Each in words.
METHODS = {
    GRAD_CAM: "Grad-CAM",
    ATTENTION: "gradient x attention",
    INTEGRATED_GRADIENTS: "integrated gradients",
    OCCLUSION: "occlusion",
}
