// Arguments of the kernels of one step. Mirrors `StepParams` in crates/swiglu-runtime/src/step.rs.

// Rows of contiguous elements.
struct MatrixRef {
    void* data;  // null where an operand is absent
    i64 stride;  // elements from row to row
};

struct StepParams {
    MatrixRef left[2];   // [rows, depth] (depth order) or [depth, rows] (outer order); dz of gate_backward
    MatrixRef right[2];  // [cols, depth] (depth order) or [depth, cols] (outer order)
    MatrixRef saved[2];  // pre-activations of gate and up, [rows, cols]
    MatrixRef out[3];    // [rows, cols]; of dgated and gate_backward: dgate, dup, and z, which may be null
    const void* bias;    // [cols], or null
    int rows, cols, depth;  // of one half where halves are paired
    int raster_along_n;     // 0: bands of tiles are walked along the rows; 1: along the columns
    int raster_group;       // tiles across a band
};

enum class Step {
    gate, gate_backward, down, down_input_grad, dgated, input_grad, weight_grad, weight_grad_add, down_weight_grad,
    down_weight_grad_add, bias_grad, bias_grad_add, down_bias_grad, down_bias_grad_add
};
enum class OperandMajor { depth, outer };           // which index is contiguous
enum class Paired { nothing, depth, rows, columns };  // what there is twice
