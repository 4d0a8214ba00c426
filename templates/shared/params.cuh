// Arguments of every forward kernel. Mirrors `KernelParams` in crates/swiglu-runtime/src/launch.rs.

struct Params {
    const void* x;          // [m, k]
    const void* gate;       // [n, k] (k_major) or [k, n] (n_major; of int4 [k / 8, n] words)
    const void* up;         // like gate
    const void* gate_bias;  // [n], or null
    const void* up_bias;    // [n], or null
    void* z;                // [m, n]
    void* saved_gate;       // [m, n], forward_save only: x Wg + bg
    void* saved_up;         // [m, n], forward_save only: x Wu + bu
    i64 x_stride;           // elements from row to row
    i64 gate_stride;
    i64 up_stride;
    i64 z_stride;
    i64 saved_gate_stride;
    i64 saved_up_stride;
    int m, n, k;
    int raster_along_n;     // 0: bands of tiles are walked along M; 1: along N
    int raster_group;       // tiles across a band
    u16 are_weights_passing, is_z_passing;  // wgmma_tma: L2 need not keep them
    const float* x_scale;   // e4m3 x: [m], or one for all rows
    const void* gate_scale; // e4m3 weights: float [n], or one for all columns; int4: [ceil(k / 128), n], numbers like x
    const void* up_scale;   // like gate_scale
    i64 scale_stride;       // int4: numbers from group to group
    int x_row_scales;       // 0: one for all rows
    int weight_row_scales;  // 0: one for all columns
};

enum class Op { forward, forward_save };
enum class WeightMajor { k_major, n_major };
enum class Output { z, gate, up };  // what a kernel stores: forward z only
