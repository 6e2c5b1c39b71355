// What _host takes from _C.so: everything else is hidden there.
#pragma once

#define TECO_VISIBLE __attribute__((visibility("default")))
