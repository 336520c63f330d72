"""Synthetic scenes: a seed in, a scenes folder in the layout of ADEChallengeData2016 out."""

from fcn_dist.data.synthetic.folder import CLASSES as CLASSES
from fcn_dist.data.synthetic.folder import Scene as Scene
from fcn_dist.data.synthetic.folder import draw_scene as draw_scene
from fcn_dist.data.synthetic.folder import render as render
