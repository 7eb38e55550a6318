"""Kills the real commands at random moments and looks whether anything is lost: scripts/torture_kills --help"""
