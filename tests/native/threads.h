// How many threads the stand-in for the OpenMP runtime gives to a team (threads.cpp).
#pragma once

namespace check {

extern int available_threads;

}  // namespace check
