// A warp keeps its lanes in fragments that stand at different instructions. The one furthest from the
// exit goes first, so that lanes meet again where their paths join; an instruction that wants certain lanes
// together holds its fragment until they have come.
#pragma once
#include "machine.h"

namespace ptx {

void add_fragment(Warp& w, int pc, u32 mask);
void remove_fragment(Warp& w, int f);

// Fragments at the same place become one.
void merge(Warp& w);

// The fragment to run, or -1. Where lanes have long not met, the one ahead gets its turn now and then, so
// that none starves while others spin.
int pick_fragment(Warp& w);

// Lanes `active` of `f` are about to run `i`: true if all lanes it wants are there; else they wait.
bool converged(Warp& w, int f, const Instr& i, u32 active);

// No fragment is ready: let those go whose partners have exited, or raise what is wrong.
void stuck(Warp& w);

void branch(Warp& w, int f, const Instr& i, u32 taken);

}  // namespace ptx
